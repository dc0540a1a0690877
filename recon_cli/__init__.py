"""The command line ``recon``: one file a command, heavy imports only when a command runs."""
