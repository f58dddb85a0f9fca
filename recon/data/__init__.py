"""Text, tokens, batches."""

from recon.data.module import TokenData
from recon.data.sources import HubDataset, SavedDataset, StandardLibrary, TextSource
from recon.data.text_files import TextFiles

__all__ = ["HubDataset", "SavedDataset", "StandardLibrary", "TextFiles", "TextSource", "TokenData"]
