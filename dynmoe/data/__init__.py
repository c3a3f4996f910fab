"""Data sets of environments, read and evaluated by DomainBed's protocol."""
