"""Gradients that are not finite: skipped steps, the loss scale, going back after a divergence, spikes."""
