"""Code that lies beside exported weights, for the software that loads them; never imported here."""
