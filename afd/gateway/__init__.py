"""HTTP front of the cluster: OpenAI API, tokenizer, templates, admission queue, routing, migration. No torch here.

serve        process entry: `run_gateway`
app          FastAPI application        api/        request and response shapes
dispatcher   which worker runs what (pure: events and `now` in, messages out)
sequence     one choice's tokens -> text (pure)       generation   one HTTP request's choices
"""
