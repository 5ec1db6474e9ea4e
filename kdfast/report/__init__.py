"""From records to what is read: claims, figures, tables, TeX, README, docs. Nothing here trains."""
