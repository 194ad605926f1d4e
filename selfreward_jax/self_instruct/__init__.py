"""Self-Instruct: the request for new prompts and the filters that its answers pass."""
