"""State that outlives the server: the folder, the database, and the lifetimes of resources."""
