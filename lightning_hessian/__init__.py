"""Hessian spectra of a PyTorch Lightning run, streamed beside its loss."""

__version__ = "0.1.0.dev0"
