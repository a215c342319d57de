"""lightship: quantize a Mixture-of-Experts model to W4AFP8, prove that it is the same model, and ship it."""

__version__ = "0.1.0"
