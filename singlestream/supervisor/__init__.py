"""`singlestream up`: an embedded Redis and the services as child processes of one machine."""
