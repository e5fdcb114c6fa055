// The launchers of quantised.h.
#include "quantised.h"

#include "coded_product.cuh"
#include "fp8.cuh"

using namespace finchtune;

namespace {

template <int KIND, int ROWS, typename T>
cudaError_t launch_coded(const CodedProductArgs<T>& args, void* stream) {
  constexpr int OUTS = ROWS > 1 ? 2 : 1;
  return launch(coded_product_kernel<T, KIND, ROWS>, ceil_div(args.n_out, OUTS * CODED_WARPS),
                ELEMENTWISE_THREADS, sizeof(UnpackTable), stream, args);
}

template <int KIND, typename T>
cudaError_t launch_coded_rows(const CodedProductArgs<T>& args, void* stream) {
  if (args.rows == 1) return launch_coded<KIND, 1>(args, stream);
  if (args.rows <= 4) return launch_coded<KIND, 4>(args, stream);
  return launch_coded<KIND, MOST_CODED_ROWS>(args, stream);
}

}  // namespace

extern "C" {

int finchtune_coded_product(int dtype, int kind, const UnpackTable* table, int64_t rows,
                            int64_t n_in, int64_t n_out, const void* x, const void* codes,
                            const float* scales, void* y, void* stream) {
  if (rows < 1 || rows > MOST_CODED_ROWS || n_in < 1 || n_in % 32 != 0 || n_out < 1)
    return cudaErrorInvalidValue;
  if (!aligned(x, codes)) return cudaErrorMisalignedAddress;
  return with_vectors(
      dtype, [](int) { return true; },
      [&](auto element, auto) {
        using T = decltype(element);
        CodedProductArgs<T> args = {rows,   n_in, n_out,    in<T>(x), in<unsigned char>(codes),
                                    scales, {},   out<T>(y)};
        if (table != nullptr) args.table = *table;
        if (kind == UNPACK_TABLE) return launch_coded_rows<UNPACK_TABLE>(args, stream);
        if (kind == UNPACK_INT8) return launch_coded_rows<UNPACK_INT8>(args, stream);
        return launch_coded_rows<UNPACK_E4M3>(args, stream);
      });
}

int finchtune_fp8_rows(int dtype, int64_t rows, int64_t n, const void* x, const float* factors,
                       void* codes, float* scales, void* stream) {
  if (rows < 1 || n < 1 || n % 16 != 0) return cudaErrorInvalidValue;
  if (!aligned(x, factors, codes)) return cudaErrorMisalignedAddress;
  return with_vectors(
      dtype, [](int) { return true; },
      [&](auto element, auto) {
        using T = decltype(element);
        return launch(fp8_rows_kernel<T>, rows, ELEMENTWISE_THREADS,
                      ELEMENTWISE_THREADS * sizeof(float), stream,
                      Fp8RowsArgs<T>{n, in<T>(x), factors, out<unsigned char>(codes), scales});
      });
}

int finchtune_turn_bytes(int64_t rows, int64_t columns, const void* from, void* to, void* stream) {
  if (rows < 1 || columns < 1 || rows % 16 != 0 || columns % 16 != 0) return cudaErrorInvalidValue;
  if (!aligned(from, to)) return cudaErrorMisalignedAddress;
  return launch(turn_bytes_kernel, ceil_div(rows, TURNED) * ceil_div(columns, TURNED),
                ELEMENTWISE_THREADS, TURNED * (TURNED + 4), stream,
                TurnBytesArgs{rows, columns, in<unsigned char>(from), out<unsigned char>(to)});
}

}  // extern "C"
