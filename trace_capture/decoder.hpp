// Runs a model over a sequence, a pass of tokens at a time. Two backends stand behind it: the CPU and CUDA.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "trace_capture/model.hpp"
#include "trace_capture/sampling.hpp"
#include "traces/reader.hpp"

namespace kvreplay {

class Recorder;

class Decoder {
 public:
  virtual ~Decoder() = default;

  virtual void reset() = 0;        // a new sequence
  virtual Pos n_past() const = 0;  // tokens passed so far
  // Tokens that one pass takes at most. Under dynamic RoPE scaling beyond the model's context this is the capacity: the
  // prompt has to come in one pass, for its rotation depends on its length.
  virtual Pos max_pass() const = 0;
  virtual std::string name() const = 0;  // "cpu", "cuda: NVIDIA H200", for provenance

  // Passes ids through every layer, at positions n_past() and up; queries, keys, values and attention outputs go to
  // the recorder, where there is one. Throws std::invalid_argument for no token, more than max_pass(), tokens beyond
  // the capacity or an id outside the vocabulary (the sequence is then as before), DeviceError.
  virtual void pass(std::span<const std::int32_t> ids, Recorder* recorder) = 0;

  // Of the last pass of n tokens. row i in [0, n): after its token i.
  virtual void logits(Pos row, std::span<float> out) = 0;  // (vocab)
  // out[i] = log p(next[i] | all tokens up to row i); next and out: (n) or fewer.
  virtual void log_probabilities(std::span<const std::int32_t> next, std::span<float> out) = 0;
  virtual Choice choose(const Sampling& sampling, std::uint64_t step) = 0;  // from the last row
};

// capacity: tokens that the cache has room for. threads 0 = all. The model must outlive the decoder.
std::unique_ptr<Decoder> make_cpu_decoder(const Model& model, Pos capacity, int threads = 0);
// Weights are copied to the device. Throws DeviceError: built without CUDA, no device, too little memory.
std::unique_ptr<Decoder> make_cuda_decoder(const Model& model, Pos capacity, int device = 0);
bool built_with_cuda();

}  // namespace kvreplay
