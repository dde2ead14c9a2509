"""Wire format of the service; generated from the .proto files beside this one."""
