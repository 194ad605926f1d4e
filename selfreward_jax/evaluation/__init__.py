"""What is measured about a model: one file a table or figure of the paper."""
