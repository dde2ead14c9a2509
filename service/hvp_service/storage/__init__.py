"""What outlives the server: the state folder, the database, and how long things live."""
