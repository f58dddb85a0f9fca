"""The public name of the mask enforcer. Scopes attach it themselves, so it lives beside them."""

from recon.scopes.enforcement import ZERO_KEEPING, MaskEnforcer

__all__ = ["ZERO_KEEPING", "MaskEnforcer"]
