"""Attacks, and the named, versioned batteries of them."""
