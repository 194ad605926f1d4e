"""Data: typed records in jsonl, OpenAssistant trees, chat text and batches."""
