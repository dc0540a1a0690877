"""The report: one self-contained HTML file made from what an output folder holds."""
