"""Doors to files: image series (DICOM, NIfTI), raw data of scanners, measurement files."""
