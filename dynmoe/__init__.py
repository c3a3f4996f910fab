"""Dynamic Mixture of Experts: experiments on Transformers that tune their own number of experts."""

__version__ = "0.1.0"
