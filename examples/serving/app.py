# /// script
# requires-python = ">=3.11"
# dependencies = ["faiss-cpu", "fastapi", "pyarrow", "pydantic", "torch", "uvicorn"]
# ///
"""
An ordinary FastAPI app around the index.

    mmesid index --model_dir runs/quickstart/recommender --output_dir runs/quickstart/index
    python examples/serving/export_users.py --model_dir runs/quickstart/recommender --output_file users.pt2
    INDEX_DIR=runs/quickstart/index USERS_FILE=users.pt2 uvicorn --app-dir examples/serving --factory app:create
    curl localhost:8000/recommend --json '{"history": ["sku000007", "sku000031"], "count": 3}'
"""

import os

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field
from retrieval import Retrieval


class Question(BaseModel):
    history: list[str] = Field(max_length=10_000)
    count: int = Field(10, ge=1, le=1000)


def create() -> FastAPI:
    """The app for the index and the user encoder that the environment names."""
    retrieval = Retrieval(os.environ["INDEX_DIR"], os.environ["USERS_FILE"])
    app = FastAPI(title="Recommendations")

    # Not `async`: FastAPI runs it in a thread, so one user does not wait for the encoder of another.
    @app.post("/recommend")
    def recommend(question: Question) -> list[dict]:
        try:
            return retrieval.recommend(question.history, question.count)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error

    return app
