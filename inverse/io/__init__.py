"""Doors to files: DICOM series, measurement files."""
