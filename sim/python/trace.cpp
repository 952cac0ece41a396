// kvreplay.open: a trace's arrays as numpy arrays.
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include "sim/python/arrays.hpp"
#include "sim/python/bindings.hpp"
#include "traces/reader.hpp"

namespace kvreplay::python {
namespace {

using Read = void (TraceReader::*)(int, int, Pos, Pos, std::span<float>) const;

// Rows of some tokens, in ascending order, of every head: (n_heads, tokens, width). Reads without the lock.
py::array_t<float> rows_of(const TraceReader& reader, int layer, int n_heads, int width, std::span<const Pos> tokens,
                           Read read) {
  auto array = empty_array<float>({n_heads, std::ssize(tokens), width});
  const std::span<float> out = span_of(array);
  py::gil_scoped_release other_threads;
  reader.check_unchanged();
  for (int head = 0; head < n_heads; ++head) {
    for (std::size_t begin = 0, end = 0; begin < tokens.size(); begin = end) {
      for (end = begin + 1; end < tokens.size() && tokens[end] == tokens[end - 1] + 1; ++end) {
      }
      const std::size_t first = std::size_t(head) * tokens.size() + begin;
      (reader.*read)(layer, head, tokens[begin], tokens[end - 1] + 1,
                     out.subspan(first * std::size_t(width), (end - begin) * std::size_t(width)));
    }
  }
  return array;
}

py::array_t<float> all_rows(const TraceReader& reader, int layer, int width, Read read) {
  std::vector<Pos> all(std::size_t(reader.info().n_tokens));
  for (std::size_t i = 0; i < all.size(); ++i) {
    all[i] = Pos(i);
  }
  return rows_of(reader, layer, reader.info().n_kv_heads, width, all, read);
}

py::object w_o(const TraceReader& reader, int layer) {
  if (!reader.has_w_o(layer)) {
    return py::none();
  }
  const std::vector<float> values = reader.read_w_o(layer);
  auto array = empty_array<float>({reader.hidden(layer), std::ssize(values) / reader.hidden(layer)});
  std::copy(values.begin(), values.end(), array.mutable_data());
  return array;
}

py::array_t<float> scores(const TraceReader& reader, int layer, const std::string& name) {
  const TraceInfo& info = reader.info();
  auto array = empty_array<float>({info.n_kv_heads, info.n_tokens});
  float* at = array.mutable_data();
  for (int head = 0; head < info.n_kv_heads; ++head) {
    const std::vector<float> row = reader.read_scores(layer, name, head);
    at = std::copy(row.begin(), row.end(), at);
  }
  return array;
}

py::list spans_of(const TraceReader& reader) {
  py::list spans;
  for (const Span& s : reader.info().spans) {
    spans.append(py::make_tuple(s.name, s.begin, s.end));
  }
  return spans;
}

py::object rope_of(const TraceReader& reader) {
  const Rope& rope = reader.info().rope;
  if (!rope.present) {
    return py::none();
  }
  return py::dict(py::arg("style") = rope.style, py::arg("rotary_dim") = rope.rotary_dim,
                  py::arg("attention_factor") = rope.attention_factor, py::arg("theta") = rope.theta,
                  py::arg("scaling_json") = rope.scaling_json, py::arg("invertible") = rope.invertible,
                  py::arg("inv_freq") = copy_of<double>(rope.inv_freq));
}

std::string describe_trace(const TraceReader& reader) {
  const TraceInfo& i = reader.info();
  return fmt::format("<kvreplay.Trace {}: layers {}; {} query heads, {} KV heads; {} tokens, {} of them prompt>",
                     i.path.string(), fmt::join(i.layers, ", "), i.n_heads, i.n_kv_heads, i.n_tokens, i.prompt_len);
}

}  // namespace

void bind_trace(py::module_& m) {
  const auto info = [](auto member) { return [member](const TraceReader& t) { return t.info().*member; }; };
  const auto column = [](auto member) {
    return [member](const TraceReader& t) { return copy_of(std::span(std::as_const(t.info().*member))); };
  };
  py::class_<TraceReader>(m, "Trace", R"(A trace, checked and open for reading. Arrays are new ones, float32.

q and k are as they enter attention: after QK-norm and RoPE, before the softmax scale. Layers are the model's own
numbers. TraceError where the file, a layer or an array is not there or not as it was when it was opened.)")
      .def(py::init<const std::filesystem::path&>(), py::arg("path"))
      .def_property_readonly(
          "path", [](const TraceReader& t) { return t.info().path.string(); }, "the file")
      .def_property_readonly("name", info(&TraceInfo::stem), "the file's stem, which results name")
      .def_property_readonly("model_name", info(&TraceInfo::model_name), "of the captured model")
      .def_property_readonly("architecture", info(&TraceInfo::architecture), "of the captured model")
      .def_property_readonly("generator", info(&TraceInfo::generator), "what wrote the file")
      .def_property_readonly("content_hash", info(&TraceInfo::content_hash), "of tokens and tensors; '' if not stored")
      .def_property_readonly("uuid", info(&TraceInfo::uuid), "of the capture")
      .def_property_readonly("complete", info(&TraceInfo::complete), "False if the writer never closed the file")
      .def_property_readonly(
          "dtype", [](const TraceReader& t) { return std::string(name_of(t.info().element)); },
          "of the stored numbers: f16, bf16 or f32")
      .def_property_readonly("n_layers", info(&TraceInfo::n_layers), "of the model")
      .def_property_readonly("layers", info(&TraceInfo::layers), "numbers of the layers in the file, ascending")
      .def_property_readonly("n_heads", info(&TraceInfo::n_heads), "query heads")
      .def_property_readonly("n_kv_heads", info(&TraceInfo::n_kv_heads), "KV heads")
      .def_property_readonly("group_size", info(&TraceInfo::group_size), "n_heads / n_kv_heads")
      .def_property_readonly("head_dim", info(&TraceInfo::head_dim), "width of queries and keys")
      .def_property_readonly("v_head_dim", info(&TraceInfo::v_head_dim), "width of values")
      .def_property_readonly("attention_scale", info(&TraceInfo::attention_scale), "softmax scale")
      .def_property_readonly("logit_softcap", info(&TraceInfo::logit_softcap), "0: none")
      .def_property_readonly("sliding_window", info(&TraceInfo::sliding_window), "of each layer of the model; 0: none")
      .def_property_readonly("n_tokens", info(&TraceInfo::n_tokens), "tokens with keys and values")
      .def_property_readonly("prompt_len", info(&TraceInfo::prompt_len), "how many of them are the prompt's")
      .def_property_readonly("token_ids", column(&TraceInfo::token_ids), "int32 (n_tokens,)")
      .def_property_readonly("positions", column(&TraceInfo::positions), "int32 (n_tokens,)")
      .def_property_readonly("phase", column(&TraceInfo::phase), "uint8 (n_tokens,): 0 prefill, 1 decode")
      .def_property_readonly("logprob", column(&TraceInfo::logprob), "float32 (n_tokens,), or empty if not stored")
      .def_property_readonly("pieces", info(&TraceInfo::pieces), "list of str (n_tokens), or empty if not stored")
      .def_property_readonly("spans", &spans_of, "list of (name, begin, end): half-open ranges of tokens")
      .def_property_readonly("rope", &rope_of, "dict of what /model/rope says, or None")
      .def(
          "q",
          [](const TraceReader& t, int layer) {
            return rows_of(t, layer, t.info().n_heads, t.info().head_dim, t.q_index(layer), &TraceReader::read_q);
          },
          py::arg("layer"), "float32 (n_heads, len(q_index(layer)), head_dim): the stored queries.")
      .def(
          "q_index", [](const TraceReader& t, int layer) { return copy_of<Pos>(t.q_index(layer)); }, py::arg("layer"),
          "int32: tokens whose queries are stored, ascending.")
      .def(
          "k",
          [](const TraceReader& t, int layer) { return all_rows(t, layer, t.info().head_dim, &TraceReader::read_k); },
          py::arg("layer"), "float32 (n_kv_heads, n_tokens, head_dim)")
      .def(
          "v",
          [](const TraceReader& t, int layer) { return all_rows(t, layer, t.info().v_head_dim, &TraceReader::read_v); },
          py::arg("layer"), "float32 (n_kv_heads, n_tokens, v_head_dim)")
      .def(
          "out",
          [](const TraceReader& t, int layer) {
            return rows_of(t, layer, t.info().n_heads, t.info().v_head_dim, t.out_index(layer), &TraceReader::read_out);
          },
          py::arg("layer"), "float32 (n_heads, len(out_index(layer)), v_head_dim): the model's own attention output.")
      .def(
          "out_index", [](const TraceReader& t, int layer) { return copy_of<Pos>(t.out_index(layer)); },
          py::arg("layer"), "int32: tokens whose attention output is stored, ascending.")
      .def("w_o", &w_o, py::arg("layer"), "float32 (hidden, n_heads * v_head_dim), or None if not stored.")
      .def("score_names", &TraceReader::score_names, py::arg("layer"), "names of the external scores stored.")
      .def("scores", &scores, py::arg("layer"), py::arg("name"), "float32 (n_kv_heads, n_tokens)")
      .def("__fspath__", [](const TraceReader& t) { return t.info().path.string(); })
      .def("__repr__", &describe_trace);

  m.def(
      "open", [](const std::filesystem::path& path) { return TraceReader(path); }, py::arg("path"),
      "Opens a trace for reading; TraceError says in one sentence what is wrong with a file.");
}

}  // namespace kvreplay::python
