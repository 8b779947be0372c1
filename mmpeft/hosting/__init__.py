"""A module that hosts parts: its class, its forward pass, its weights, and what runs in it. No part is named here."""
