"""Models whose blocks are on the host or on disk, and on the device only while needed."""
