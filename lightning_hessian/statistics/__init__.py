"""Statistics of spectra: arrays in, numbers out."""
