"""Every operation at the shapes of served models, with peers and ceilings beside it in the same run."""
