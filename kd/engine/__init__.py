"""What a run needs around the methods: configuration, training loop, evaluation, records, pictures."""
