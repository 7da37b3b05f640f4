"""What the environments of the library are made of: files, forms, pictures, SQL that only reads, a server."""
