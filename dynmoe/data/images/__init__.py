"""Images of several domains (DomainBed)."""
