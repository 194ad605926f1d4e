"""The mesh and the tables from logical axes to mesh axes."""
