#include "policies/npy.hpp"

#include <array>
#include <cstdio>
#include <fstream>

#include "policies/errors.hpp"

namespace kvreplay {
namespace {

template <class T>
MatF read_numbers(std::ifstream& file, Eigen::Index rows, Eigen::Index cols) {
  Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> m(rows, cols);
  file.read(reinterpret_cast<char*>(m.data()), static_cast<std::streamsize>(sizeof(T)) * m.size());
  return m.template cast<float>();
}

}  // namespace

MatF read_npy(const std::string& path) {
  const auto refuse = [&](const std::string& why) { throw ConfigError(path + ": " + why); };
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    refuse("cannot be opened");
  }
  // Magic, version, length of the header in two bytes (four from version 2 on), a Python dictionary.
  std::array<unsigned char, 12> head{};
  file.read(reinterpret_cast<char*>(head.data()), 10);
  if (!file || std::string(head.begin(), head.begin() + 6) != "\x93NUMPY") {
    refuse("is not a file of numpy.save");
  }
  std::size_t length = head[8] + 256U * head[9];
  if (head[6] > 1) {
    file.read(reinterpret_cast<char*>(head.data() + 10), 2);
    length += 65536U * (head[10] + 256U * head[11]);
  }
  constexpr std::size_t kLongest = 1U << 20;
  constexpr long long kMost = 1 << 20;
  std::string header(std::min(length, kLongest), ' ');
  file.read(header.data(), static_cast<std::streamsize>(header.size()));
  long long rows = 0, cols = 0;
  const std::size_t shape = header.find("'shape': (");
  if (!file || shape == std::string::npos ||
      std::sscanf(header.c_str() + shape, "'shape': (%lld, %lld)", &rows, &cols) != 2 || rows < 1 || cols < 1 ||
      rows > kMost || cols > kMost) {
    refuse("does not hold a matrix");
  }
  if (header.find("'fortran_order': False") == std::string::npos) {
    refuse("is in Fortran order; save numpy.ascontiguousarray of it");
  }
  const bool single = header.find("'<f4'") != std::string::npos;
  if (!single && header.find("'<f8'") == std::string::npos) {
    refuse("does not hold float32 or float64");
  }
  MatF m = single ? read_numbers<float>(file, rows, cols) : read_numbers<double>(file, rows, cols);
  if (!file) {
    refuse("ends before its last number");
  }
  if (!m.allFinite()) {
    refuse("holds numbers that are not finite");
  }
  return m;
}

}  // namespace kvreplay
