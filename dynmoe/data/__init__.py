"""Data sets: environments of images by DomainBed's protocol, and the texts of GLUE."""
