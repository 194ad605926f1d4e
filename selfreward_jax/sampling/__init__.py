"""Our own sampler: jitted prefill and decode, token sampling, and the host loop over requests."""
