"""What a person sees while a run runs and after it: progress, metrics, the report."""
