"""`finetune`: the command line. It knows the API (`finetune_api`) and nothing of operator and trainer."""
