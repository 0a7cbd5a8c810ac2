// Bit-parallel input-stationary processing element, the baseline of the area comparison: one
// resident activation, one weight a cycle from the left, a multiply-accumulate on the partial sum.
module mac_pe #(
    parameter WIDTH = 8,
    parameter PSUM = 32
) (
    input                          clock,
    input                          load,
    input      signed [WIDTH-1:0]  activation_in,
    output reg signed [WIDTH-1:0]  activation,
    input      signed [WIDTH-1:0]  weight_in,
    output reg signed [WIDTH-1:0]  weight,
    input      signed [PSUM-1:0]   psum_in,
    output reg signed [PSUM-1:0]   psum
);
    always @(posedge clock) begin
        if (load) activation <= activation_in;
        weight <= weight_in;
        psum   <= psum_in + activation * weight_in;
    end
endmodule
