"""Text, tokens, batches."""

from recon.data.loader import ResumableLoader
from recon.data.module import TokenData
from recon.data.sources import HubDataset, SavedDataset, StandardLibrary, TextSource
from recon.data.text_files import TextFiles

__all__ = ["HubDataset", "ResumableLoader", "SavedDataset", "StandardLibrary", "TextFiles", "TextSource", "TokenData"]
