"""Host adaptors: one module per host toolkit, the only places that import it. Found by name through entry points."""
