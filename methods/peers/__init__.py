"""Other projects' compressors behind the contract of a method: one module per library, their scripts in `scripts`.

Each runs in an interpreter of its own, because their pins clash with ours and with each other's.
"""
