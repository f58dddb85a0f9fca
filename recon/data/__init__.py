"""Text, tokens, batches."""

from recon.data.chat import Chat
from recon.data.loader import ResumableLoader
from recon.data.mixture import Mixture
from recon.data.module import TokenData
from recon.data.self_generated import SelfGenerated
from recon.data.sources import HubDataset, SavedDataset, StandardLibrary, TextSource
from recon.data.text_files import TextFiles
from recon.data.token_source import TokenSource

__all__ = [
    "Chat",
    "HubDataset",
    "Mixture",
    "ResumableLoader",
    "SavedDataset",
    "SelfGenerated",
    "StandardLibrary",
    "TextFiles",
    "TextSource",
    "TokenData",
    "TokenSource",
]
