#include "trace_capture/cuda/carrier.cuh"

#include <algorithm>

#include "policies/errors.hpp"

namespace kvreplay::cuda {
namespace {

std::size_t sz(std::int64_t n) { return static_cast<std::size_t>(n); }

// How many of the ascending tokens come before `token`.
std::size_t n_before(const std::vector<Pos>& tokens, Pos token) {
  return sz(std::lower_bound(tokens.begin(), tokens.end(), token) - tokens.begin());
}

}  // namespace

Carrier::~Carrier() {
  cudaStreamSynchronize(compute_.get());  // packets and slots are in use until then
  cudaStreamSynchronize(copy_.get());
}

void Carrier::begin(const Recorder& recorder) {
  static_assert(sizeof(Pos) == sizeof(std::int32_t));
  compute_.wait();  // whatever still reads the last plan or packets
  copy_.wait();
  const RecordPlan& plan = recorder.plan();
  std::vector<std::int32_t> all(plan.layers.begin(), plan.layers.end());
  all.insert(all.end(), plan.queries.begin(), plan.queries.end());
  all.insert(all.end(), plan.outputs.begin(), plan.outputs.end());
  if (plan_.bytes() < all.size() * sizeof(std::int32_t)) {
    plan_ = {};
    plan_ = DeviceMemory(all.size() * sizeof(std::int32_t), "the list of recorded tokens");
  }
  check(cudaMemcpyAsync(plan_.data(), all.data(), all.size() * sizeof(std::int32_t), cudaMemcpyHostToDevice,
                        compute_.get()),
        "copying the list of recorded tokens");
  compute_.wait();
  layers_ = reinterpret_cast<std::int32_t*>(plan_.data());
  queries_ = layers_ + plan.layers.size();
  outputs_ = queries_ + plan.queries.size();

  for (Packet& packet : packets_) {
    if (packet.memory.bytes() < recorder.slot_bytes()) {
      packet.memory = {};
      packet.memory = DeviceMemory(recorder.slot_bytes(), "a packet of recorded rows");
    }
  }
  filled_.clear();
  for (std::size_t i = 0; i < recorder.n_slots(); ++i) {
    filled_.push_back(std::make_shared<Event>());
  }
}

template <class T>
void Carrier::carry(Recorder& recorder, const PassRows<T>& rows, std::size_t begin, std::size_t end) {
  const RecordPlan& plan = recorder.plan();
  Pos most = rows.n;  // tokens of a packet
  while (most > 1 && largest_packet(plan, most, end - begin) > recorder.slot_bytes()) {
    most = (most + 1) / 2;
  }
  for (Pos done = 0; done < rows.n;) {
    const Pos first = rows.first + done, n = std::min(most, rows.n - done);
    const Recorder::Slot slot = recorder.acquire(first, n, begin, end);
    const PacketLayout& layout = slot.layout;
    Packet& packet = packets_[next_];
    next_ = (next_ + 1) % kPackets;

    Packing<T> packing{};
    packing.layers = layers_ + begin;
    packing.queries = queries_ + n_before(plan.queries, first);
    packing.outputs = outputs_ + n_before(plan.outputs, first);
    packing.cache = rows.cache;
    packing.q = rows.q;
    packing.out = rows.out;
    packing.packet = packet.memory.data();
    packing.k_at = layout.at[0].k;
    packing.v_at = layout.at[0].v;
    packing.q_at = layout.at[0].q;
    packing.out_at = layout.at[0].out;
    packing.layer_stride = layout.at[0].end - layout.at[0].k;
    KVREPLAY_CHECK(layout.at.back().k == layout.at[0].k + (layout.at.size() - 1) * packing.layer_stride);
    packing.first = first;
    packing.pass_first = rows.first;
    packing.pass_n = rows.n;
    packing.n_layers = static_cast<int>(end - begin);
    packing.head_dim = plan.head_dim;
    packing.capacity = rows.capacity;
    packing.counts = {plan.n_heads, plan.n_kv_heads, n, static_cast<int>(layout.queries.size()),
                      static_cast<int>(layout.outputs.size())};
    packet.copied.hold(compute_);  // its last content has left
    pack(packing, plan.element, compute_.get());
    packet.packed.record(compute_);
    packet.packed.hold(copy_);
    check(cudaMemcpyAsync(slot.bytes.data(), packet.memory.data(), slot.bytes.size(), cudaMemcpyDeviceToHost,
                          copy_.get()),
          "copying recorded rows from the device");
    packet.copied.record(copy_);
    const std::shared_ptr<Event> filled = filled_[slot.index];
    filled->record(copy_);
    recorder.submit(slot, [filled] { filled->wait(); });
    done += n;
  }
}

template void Carrier::carry<float>(Recorder&, const PassRows<float>&, std::size_t, std::size_t);
template void Carrier::carry<F16>(Recorder&, const PassRows<F16>&, std::size_t, std::size_t);
template void Carrier::carry<Bf16>(Recorder&, const PassRows<Bf16>&, std::size_t, std::size_t);

}  // namespace kvreplay::cuda
