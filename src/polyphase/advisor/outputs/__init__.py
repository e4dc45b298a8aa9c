"""An answer as text: records for CSV and JSON, the page with the chart, the files that start a deployment. Values in, text out; nothing is
written here.
"""
