"""Text, tokens, batches."""

from recon.data.module import TokenData
from recon.data.sources import HubDataset, SavedDataset, StandardLibrary, TextFiles, TextSource

__all__ = ["HubDataset", "SavedDataset", "StandardLibrary", "TextFiles", "TextSource", "TokenData"]
