// Brings packets from the device into the recorder's slots while the next layers are computed: packed on the stream of
// the computation, copied on another one, waited for by the recorder's writer thread.
#pragma once
#include <array>
#include <memory>
#include <vector>

#include "trace_capture/cuda/device.cuh"
#include "trace_capture/cuda/kernels.hpp"
#include "trace_capture/recorder.hpp"

namespace kvreplay::cuda {

// What pack() needs to know of a pass beside the packet.
template <class T>
struct PassRows {
  const T* cache;    // (layers of the model, 2, n_kv_heads, capacity, head_dim)
  const T* q;        // (layers carried at once, n, n_heads, head_dim)
  const float* out;  // the same
  Pos first, n;      // tokens of the pass
  int capacity;
};

class Carrier {
 public:
  explicit Carrier(const OwnStream& compute) : compute_(compute) {}
  ~Carrier();
  Carrier(const Carrier&) = delete;
  Carrier& operator=(const Carrier&) = delete;

  // Before the first pass of a sequence, and whenever the recorder is another one.
  void begin(const Recorder& recorder);
  // Carries the rows of plan().layers[begin, end): one packet where it fits into a slot, else several. Waits while all
  // slots are full.
  template <class T>
  void carry(Recorder& recorder, const PassRows<T>& rows, std::size_t begin, std::size_t end);

 private:
  static constexpr std::size_t kPackets = 3;  // on the device: one is packed, one copied, one ready for the next layer

  struct Packet {
    DeviceMemory memory;
    Event packed, copied;
  };

  const OwnStream& compute_;
  OwnStream copy_;
  std::array<Packet, kPackets> packets_;
  std::size_t next_ = 0;
  // (slots of the recorder): the slot is filled. Shared with the writer thread, which may outlive the decoder.
  std::vector<std::shared_ptr<Event>> filled_;
  DeviceMemory plan_;  // layers, queries, outputs of the recorder's plan
  std::int32_t *layers_ = nullptr, *queries_ = nullptr, *outputs_ = nullptr;  // in plan_
};

}  // namespace kvreplay::cuda
