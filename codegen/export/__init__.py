"""Export formats, one per file; files with a leading underscore belong to the format they are named after."""
