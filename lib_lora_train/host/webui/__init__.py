"""The AUTOMATIC1111 WebUI as a host: the only home of `modules.*`."""
