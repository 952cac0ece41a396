/* How an engine writes a trace: a prompt of 24 tokens in one pass, then 40 decode steps. The engine here is a toy (two
   layers of random queries, keys and values, no weights); what it hands over is what any engine has at hand.

     capture OUT.h5 && kvreplay verify OUT.h5 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "kvt.h"

enum { N_LAYERS = 2, N_HEADS = 4, N_KV_HEADS = 2, HEAD_DIM = 16, PROMPT = 24, TOKENS = 64 };

/* The engine's own memory, token by token as its projections leave it: [token][head][channel]. */
static float q[N_LAYERS][TOKENS][N_HEADS][HEAD_DIM];
static float k[N_LAYERS][TOKENS][N_KV_HEADS][HEAD_DIM];
static float v[N_LAYERS][TOKENS][N_KV_HEADS][HEAD_DIM];
static float out[N_LAYERS][TOKENS][N_HEADS][HEAD_DIM];

static void fill(float* values, int n) {
  for (int i = 0; i < n; ++i) {
    values[i] = (float)rand() / (float)RAND_MAX - 0.5F;
  }
}

/* One token's pass through one layer: causal attention over all tokens so far. */
static void pass(int layer, int token) {
  fill(&q[layer][token][0][0], N_HEADS * HEAD_DIM);
  fill(&k[layer][token][0][0], N_KV_HEADS * HEAD_DIM);
  fill(&v[layer][token][0][0], N_KV_HEADS * HEAD_DIM);
  for (int head = 0; head < N_HEADS; ++head) {
    const int kv_head = head / (N_HEADS / N_KV_HEADS);
    double total = 0, sum[HEAD_DIM] = {0};
    for (int t = 0; t <= token; ++t) {
      double logit = 0;
      for (int c = 0; c < HEAD_DIM; ++c) {
        logit += (double)q[layer][token][head][c] * k[layer][t][kv_head][c];
      }
      const double weight = exp(0.25 * logit);
      total += weight;
      for (int c = 0; c < HEAD_DIM; ++c) {
        sum[c] += weight * v[layer][t][kv_head][c];
      }
    }
    for (int c = 0; c < HEAD_DIM; ++c) {
      out[layer][token][head][c] = (float)(sum[c] / total);
    }
  }
}

static void check(kvt_status status) {
  if (status != KVT_OK) {
    fprintf(stderr, "capture: %s\n", kvt_last_error());
    exit((int)status);
  }
}

/* Tokens [first, first + n) of one layer. Strides say how the rows lie, so that nothing is copied together first. */
static void append(kvt_trace* trace, int layer, int first, int n) {
  const int64_t row = HEAD_DIM * (int64_t)sizeof(float);
  const kvt_rows k_rows = {KVT_F32, k[layer][first], row, N_KV_HEADS * row, 0, NULL};
  const kvt_rows v_rows = {KVT_F32, v[layer][first], row, N_KV_HEADS * row, 0, NULL};
  const kvt_rows q_rows = {KVT_F32, q[layer][first], row, N_HEADS * row, 0, NULL};
  const kvt_rows out_rows = {KVT_F32, out[layer][first], row, N_HEADS * row, 0, NULL};
  check(kvt_append(trace, layer, KVT_K, first, n, &k_rows));
  check(kvt_append(trace, layer, KVT_V, first, n, &v_rows));
  check(kvt_append(trace, layer, KVT_Q, first, n, &q_rows));
  check(kvt_append(trace, layer, KVT_OUT, first, n, &out_rows)); /* only the tokens in "outputs" are kept */
}

int main(int argc, char** argv) {
  if (argc != 2) {
    fprintf(stderr, "usage: %s OUT.h5\n", argv[0]);
    return 2;
  }
  kvt_trace* trace = NULL;
  check(kvt_open(argv[1],
                 "{\"model\": {\"name\": \"toy\", \"n_layers\": 2, \"n_heads\": 4, \"n_kv_heads\": 2, \"head_dim\": 16,"
                 "            \"attention_scale\": 0.25, \"dtype\": \"f32\"},"
                 " \"prompt_len\": 24, \"capacity\": 64, \"element\": \"f16\", \"outputs\": [23, 24, 40, 63],"
                 " \"provenance\": \"random numbers of trace_capture/examples/capture.c\"}",
                 &trace));
  int32_t ids[TOKENS];
  for (int token = 0; token < PROMPT; ++token) {
    ids[token] = token;
    for (int layer = 0; layer < N_LAYERS; ++layer) {
      pass(layer, token);
    }
  }
  for (int layer = 0; layer < N_LAYERS; ++layer) {
    append(trace, layer, 0, PROMPT);
  }
  check(kvt_commit(trace, PROMPT, ids, NULL));

  int committed = PROMPT;
  for (int token = PROMPT; token < TOKENS; ++token) {
    ids[token] = token;
    for (int layer = 0; layer < N_LAYERS; ++layer) {
      pass(layer, token);
      append(trace, layer, token, 1);
    }
    if ((token + 1) % 16 == 0) { /* an engine looks at the clock: about once a second */
      check(kvt_commit(trace, token + 1 - committed, ids + committed, NULL));
      committed = token + 1;
    }
  }
  check(kvt_close(trace, 1));
  return 0;
}
