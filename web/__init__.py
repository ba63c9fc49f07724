"""The web page on which people ask an assistant about images, and its API (docs/web.md)"""
