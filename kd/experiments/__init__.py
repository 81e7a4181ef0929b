"""Many runs: sweeps, comparisons, plots, the demo."""
