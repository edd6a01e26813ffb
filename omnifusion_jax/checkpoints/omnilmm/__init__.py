"""OmniLMM-12B, and MiniCPM-V 1.0 (which is OmniLMM-3B) and 2.0, under the names of their public files.

Open systems.py first: it says what the systems are and where they differ.
"""
