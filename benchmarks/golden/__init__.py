"""Golden digests: digests of what the commands write for many settings, recorded once and compared later."""
