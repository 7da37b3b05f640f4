"""What the environments of the library are made of: a file tree, a form, pictures, SQL that only reads, a web server."""
